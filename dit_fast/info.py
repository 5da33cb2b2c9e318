"""Output of `dit-fast info`: versions, devices, optional packages, and the backend of each op with the reason."""

import importlib
import importlib.util
import platform
from importlib import metadata

from dit_fast import _C, __version__, backend, cpu, kernels

# import name -> (what it is for, how to get it)
OPTIONAL = {
    "triton": ("fused GPU kernels", "comes with the CUDA build of torch"),
    "flash_attn": ("attention=flash", "pip install flash-attn --no-build-isolation (needs nvcc)"),
    "pydantic": ("training: it checks the configuration", "pip install 'dit_fast[train]'"),
    "deepspeed": ("several processes, ZeRO", "pip install 'dit_fast[train]'"),
    "fsspec": ("shards of servers and object stores", "pip install 'dit_fast[remote]'"),
    "aiohttp": ("shards over http(s)://", "pip install 'dit_fast[remote]'"),
    "s3fs": ("shards in s3://", "pip install 'dit_fast[remote]' s3fs"),
    "gcsfs": ("shards in gs://", "pip install 'dit_fast[remote]' gcsfs"),
    "tensorboard": ("TensorBoard logs", "pip install 'dit_fast[train]'"),
    "matplotlib": ("figures and reports", "pip install 'dit_fast[train]'"),
    "torchdiffeq": ("sampler=dopri5", "pip install 'dit_fast[ode]'"),
    "diffusers": ("AutoencoderKL", "pip install 'dit_fast[diffusers]'"),
    "efficientnet_lite_pytorch": ("alignment targets without a download", "pip install 'dit_fast[repa]'"),
}


def describe() -> str:
    """A page of text; never raises because something optional is missing or broken."""
    import torch

    import dit_fast.ops.adamw  # noqa: F401  registers every op

    lines = [
        f"dit_fast {__version__}   python {platform.python_version()}   torch {torch.__version__}",
        f"cpu      {cpu.describe()}",
    ]
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cuda":
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            lines.append(f"cuda:{index}   {properties.name}, {memory:.0f} GiB, sm_{properties.major}{properties.minor}")
    else:
        lines.append(f"cuda     none: {_why_no_cuda()}")
    lines.append("\noptional packages")
    lines += [f"  {name:26}{_package(name)}" for name in OPTIONAL]
    lines.append(f"  {'apex':26}{apex_state()}")
    lines.append(f"\nCPU library   {_C.describe()}")
    if importlib.util.find_spec("triton") is not None:
        lines.append(f"launches      {_launches()}")
    lines.append(f"shard reader  {_C.host_unavailable() or 'compiled'}")
    forced = backend.forced()
    rule = "first usable implementation runs" if forced is None else f"{backend.FORCED}={forced} decides"
    lines.append(f"\nops on {device_type} ({rule})")
    for op in backend.ops():
        answers = "; ".join(f"{name}: {why}" for name, why in backend.explain(op, device_type))
        lines.append(f"  {op:26}{answers}")
    return "\n".join(lines)


def _launches() -> str:
    try:
        why = kernels.ordinary_launches()
    except Exception as error:
        why = f"triton does not load: {str(error).splitlines()[:1]}"
    return "short" if why is None else f"the ordinary way, which is slower: {why}"


def _why_no_cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    return "torch has CUDA, but no device is visible (nvidia-smi, CUDA_VISIBLE_DEVICES)"


def _package(name: str) -> str:
    purpose, remedy = OPTIONAL[name]
    if importlib.util.find_spec(name) is None:
        return f"absent ({purpose}): {remedy}"
    try:
        version = metadata.version(metadata.packages_distributions()[name][0])
    except (KeyError, metadata.PackageNotFoundError):
        version = "present, version unknown"
    return f"{version} ({purpose})"


def apex_state() -> str:
    """NVIDIA apex is known by its compiled module: the distribution called `apex` on PyPI is another project."""
    if importlib.util.find_spec("amp_C") is not None and importlib.util.find_spec("apex.optimizers") is not None:
        return "NVIDIA apex present (optimizer.name=apex_fused_adam)"
    if importlib.util.find_spec("apex") is not None:
        return "a package called apex is installed, but it is not NVIDIA's (or lacks its CUDA extensions)"
    return "absent (optimizer.name=apex_fused_adam): build NVIDIA/apex from source; PyPI's apex is another project"
