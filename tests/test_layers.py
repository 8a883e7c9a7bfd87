"""The rooms: the method knows neither Ray nor DeepSpeed, and nothing happens on import."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import rc_ray.core

ROOT = Path(__file__).resolve().parents[1]


def imported_after(modules: list[str]) -> set[str]:
    """Top-level names in `sys.modules` of a fresh process after importing `modules`."""
    program = (
        "import importlib, json, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_core_imports_neither_ray_nor_deepspeed() -> None:
    names = [f"rc_ray.core.{module.name}" for module in pkgutil.iter_modules(rc_ray.core.__path__)]
    assert len(names) > 5
    found = imported_after(names)
    assert "torch" in found
    assert not {"ray", "deepspeed"} & found


def test_the_command_line_and_the_config_import_neither_torch_nor_ray() -> None:
    found = imported_after(["rc_ray.cli", "rc_ray.config", "rc_ray.errors", "rc_ray.artifacts"])
    assert not {"torch", "ray", "transformers", "pyarrow"} & found


def test_files_stay_readable() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in (ROOT / "rc_ray").rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert long == {}
