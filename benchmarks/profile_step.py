"""Where one training step's time goes, kernel by kernel: `python -m dit_fast.benchmarks.profile_step`.

On CUDA the device's kernels in one step, after three that warm up, and the gaps in which it had nothing to do; on a CPU
the operators. What the profiler adds to the host's time is in the gaps: times of a step are `step`'s.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dit_fast.benchmarks.profile_step", description="Profiles one step."
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, required=True, help="folder for profile_step.json")
    parser.add_argument("--small", action="store_true", help="a tiny model")
    parser.add_argument("--commit", help="recorded where there is no git history")
    options = parser.parse_args(argv)

    import torch
    from torch.profiler import DeviceType, ProfilerActivity, profile

    from dit_fast.benchmarks.cases.case import Setting
    from dit_fast.benchmarks.results import device_of, environment, occasion, rounded, write
    from dit_fast.benchmarks.step import OURS, Sides, step_cases

    device = device_of(options.device)
    case = step_cases(Setting(device, options.small))[0]
    step = Sides(case, device).make(OURS).run
    for number in range(3):
        step(number)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as record:
        step(3)
        if cuda:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    # Torch marks the optimizer's step on the device, too: a range around kernels that are counted themselves.
    events = [each for each in record.events() if each.device_type == wanted and not (cuda and each.is_user_annotation)]
    spent: dict[str, list[float]] = defaultdict(list)
    for event in events:
        spent[event.name].append(event.self_device_time_total if cuda else event.self_cpu_time_total)
    rows = sorted(
        ({"name": name, "count": len(times), "seconds": sum(times) / 1e6} for name, times in spent.items()),
        key=lambda row: -row["seconds"],  # type: ignore[operator]
    )
    span = (max(event.time_range.end for event in events) - min(event.time_range.start for event in events)) / 1e6
    busy = sum(row["seconds"] for row in rows)  # type: ignore[misc]
    write(
        options.out / "profile_step.json",
        rounded({**environment(device, options.commit), **occasion(), "case": case.name, "span_s": span, "busy_s": busy,
                 "launches": len(events), "kernels": rows}),
    )  # fmt: skip
    for row in rows[:30]:
        print(f"{row['seconds'] * 1e3:10.3f} ms {row['count']:6}  {str(row['name'])[:100]}")  # type: ignore[operator]
    print(f"{busy * 1e3:.2f} ms busy of {span * 1e3:.2f} ms, {len(events)} launches")
    return 0


if __name__ == "__main__":
    sys.exit(main())
