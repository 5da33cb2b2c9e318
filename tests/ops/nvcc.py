"""What nvcc makes of the CUDA sources: registers, spills, stack, and how wide loads and stores of global memory are.

python -m tests.ops.nvcc           compare with nvcc_lock.json
python -m tests.ops.nvcc --write   record
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from dit_fast._C.build import ARCHITECTURES, SOURCES, cuda_command, cuda_compiler

LOCK = Path(__file__).parent / "nvcc_lock.json"


def release() -> str:
    """nvcc's, such as "13.0"."""
    text = subprocess.run([str(cuda_compiler()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    assert found is not None, text
    return found[1]


def short(name: str) -> str:
    """The function's name out of a mangled one of namespaces."""
    parts, rest = [], name.removeprefix("_ZN")
    while found := re.match(r"\d+", rest):
        end = len(found[0]) + int(found[0])
        parts.append(rest[len(found[0]) : end])
        rest = rest[end:]
    return parts[-1]


def measure(architecture: str) -> list[dict[str, object]]:
    """An entry for each kernel of csrc/*.cu."""
    found = []
    for source in sorted(SOURCES.glob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            target = [f"-arch=sm_{architecture}", str(source), "-o"]
            binary = cuda_command(*target, f"{folder}/a.cubin", "-cubin", "-Xptxas", "-v")
            said = subprocess.run(binary, capture_output=True, text=True, check=True).stderr
            subprocess.run(cuda_command(*target, f"{folder}/a.ptx", "-ptx"), capture_output=True, check=True)
            ptx = Path(folder, "a.ptx").read_text()
        bodies = dict(re.findall(r"\.visible \.entry (\w+)\((.*?)\n}\n", ptx, re.S))
        entries = (
            r"entry function '(\w+)'.*?\n.*?\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill"
        )
        for name, stack, stores, loads in re.findall(entries, said):
            registers = re.search(rf"'{name}'.*?Used (\d+) registers", said, re.S)
            widths = Counter(re.findall(r"\b((?:ld|st)\.global(?:\.nc)?(?:\.v\d)?\.[a-z]+\d+)", bodies[name]))
            found.append(
                {
                    "kernel": f"{source.stem}.{short(name)}",
                    "nvcc": release(),
                    "target": f"sm_{architecture}",
                    "registers": int(registers[1]) if registers else 0,
                    "stack_bytes": int(stack),
                    "spill_bytes": int(stores) + int(loads),
                    "global_memory": dict(sorted(widths.items())),
                }
            )
    return found


def main() -> int:
    entries = [entry for architecture in ARCHITECTURES for entry in measure(architecture)]
    if "--write" in sys.argv[1:]:
        LOCK.write_text(json.dumps(entries, indent=1) + "\n")
        return 0
    return int(entries != json.loads(LOCK.read_text()))


if __name__ == "__main__":
    sys.exit(main())
