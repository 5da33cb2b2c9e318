"""The ops as a repository of Hugging Face's `kernels`: torch, Triton and nothing of ours beside it.

`kernels` imports a folder under a name that it makes up, beside whatever is installed. So what the ops need is copied,
imports become relative, and the namespace of torch's operators gets the hash of the sources.
"""

import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

import dit_fast
from dit_fast.errors import UserError

NAME = "dit_fast_ops"
VARIANT = "torch-universal"  # pure Python and Triton
PACKAGE = "dit_fast"
ROOT = Path(dit_fast.__file__).parent
START = ("ops", "layers")
MOVED = {"layers": "exchange/kernel_layers.py"}  # module of the copy: file here
NO_LIBRARY = '''"""This copy has no compiled library: CUDA runs Triton, and a CPU plain torch."""


def unavailable() -> str | None:
    return "the compiled CPU library is not part of this copy; install dit_fast for it"


cuda_unavailable = unavailable
'''
README = """---
license: apache-2.0
library_name: kernels
tags: [kernel, triton]
---

# dit_fast_ops

Fused ops of diffusion transformers, forward and backward: {names}.

```python
from kernels import get_kernel

ops = get_kernel(REPOSITORY, trust_remote_code=True)
y = ops.layer_norm_modulate(x, shift, scale)  # norm(x) * (1 + scale) + shift, one pass
```

Layers for `kernelize` (all with a backward, all for torch.compile): {layers}.

On CUDA they run Triton kernels, elsewhere plain torch. Made from dit_fast {version} by `dit-fast export ops FOLDER`.
"""


def write_kernels(out: Path) -> int:
    """Writes the repository to a new folder; returns the number of modules. UserError if `out` is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; name a new folder")
    sources = _sources()
    digest = hashlib.sha256("".join(f"{name}\n{text}" for name, text in sorted(sources.items())).encode()).hexdigest()
    namespace = f"{NAME}_{digest[:10]}"
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    package = partial / "build" / VARIANT
    for module, text in sources.items():
        packaged = any(other.startswith(f"{module}.") for other in sources) or module == "ops"
        path = package.joinpath(*module.split("."), *(["__init__"] if packaged else [])).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_rewritten(text, module, packaged, namespace))
    names, layers = _public(sources["ops"]), _classes(sources["layers"])
    (package / "__init__.py").write_text(
        f'"""Fused ops of diffusion transformers, from dit_fast {dit_fast.__version__}."""\n\n'
        f"from . import layers\nfrom .ops import {', '.join(names)}\n\n__all__ = {['layers', *names]!r}\n"
    )
    about = {"name": NAME.replace("_", "-"), "id": namespace, "version": 1, "license": "apache-2.0"}
    about |= {"python-depends": [], "backend": {"type": "cuda"}}
    (package / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")
    described = {"names": ", ".join(f"`{name}`" for name in names), "layers": ", ".join(f"`{name}`" for name in layers)}
    (partial / "README.md").write_text(README.format(version=dit_fast.__version__, **described))
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return len(sources)


def _sources() -> dict[str, str]:
    """Text by module, without the package's name, of all that the ops import, at once or later."""
    found: dict[str, str] = {}
    wanted = list(START)
    while wanted:
        module = wanted.pop()
        if module in found or not module:
            continue
        if module == "_C" or module.startswith("_C."):
            found["_C"] = NO_LIBRARY
            continue
        path = _file(module)
        if path is None:
            raise UserError(f"{PACKAGE}.{module}: no such file in this installation; install dit_fast again")
        found[module] = path.read_text()
        for node in ast.walk(ast.parse(found[module])):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
                base = (node.module or "").partition(".")[2]
                wanted.append(base)
                inside = [f"{base}.{name.name}".lstrip(".") for name in node.names]
                wanted += [name for name in inside if _file(name) is not None]
        if "." in module:
            wanted.append(module.rpartition(".")[0])
    return found


def _file(module: str) -> Path | None:
    path = ROOT / MOVED.get(module, f"{module.replace('.', '/')}.py")
    return next((each for each in (path, path.with_suffix("") / "__init__.py") if each.is_file()), None)


def _rewritten(text: str, module: str, packaged: bool, namespace: str) -> str:
    """With relative imports and a namespace of its own."""
    dots = "." * (module.count(".") + 1 + packaged)

    def relative(match: re.Match[str]) -> str:
        return f"from {dots}{match[1].lstrip('.')} import"

    text = re.sub(rf"from {PACKAGE}((?:\.\w+)*) import", relative, text)
    text = text.replace(f'NAMESPACE = "{PACKAGE}"', f'NAMESPACE = "{namespace}"')
    return text.replace(f"torch.ops.{PACKAGE}.", f"torch.ops.{namespace}.").replace(
        f"torch.ops.{PACKAGE},", f"torch.ops.{namespace},"
    )


def _public(text: str) -> list[str]:
    return [name.asname or name.name for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)
            for name in node.names]  # fmt: skip


def _classes(text: str) -> list[str]:
    return [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
