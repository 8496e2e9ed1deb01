"""Generates the Python code of the .proto files beside it, or with `--check` shows whether it is current.

    python -m protos.generate [--check]

The generated files are checked in, so that installing needs no compiler and a change of the wire shows in
review. Paths are given from the repository's root, which makes the generated imports come out as
`from protos import common_pb2`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent


def generate(out: Path) -> None:
    """Writes the generated modules and their stubs below `out`/protos."""
    from grpc_tools import protoc

    sources = sorted(f"protos/{path.name}" for path in HERE.glob("*.proto"))
    # The plugins lie beside this interpreter, whether or not its venv is on the PATH.
    plugins = [f"--plugin={name}={Path(sys.executable).parent / name}"
               for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    arguments = [
        "protoc", *plugins, f"-I{ROOT}", f"--python_out={out}", f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}", f"--mypy_grpc_out=quiet:{out}", *sources,
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc refused the .proto files")


def stale() -> list[str]:
    """The generated files that differ from what the .proto files give."""
    with tempfile.TemporaryDirectory() as out:
        generate(Path(out))
        fresh = {path.name: path.read_bytes() for path in (Path(out) / "protos").iterdir()}
    kept = {path.name: path.read_bytes() for path in HERE.glob("*_pb2*")}
    return sorted(name for name in fresh.keys() | kept.keys() if fresh.get(name) != kept.get(name))


def main() -> None:
    if "--check" not in sys.argv[1:]:
        generate(ROOT)
        return
    if names := stale():
        raise SystemExit(f"not current: {', '.join(names)}; run python -m protos.generate")


if __name__ == "__main__":
    main()
