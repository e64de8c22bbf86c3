"""What `import bittern` costs, and that it registers whichever of bittern and diffusers comes first."""

from __future__ import annotations

import subprocess
import sys

import pytest

REGISTERED = "from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'bittern' in m"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    code = """
import sys, time
start = time.perf_counter()
import bittern
took = time.perf_counter() - start
heavy = {'torch', 'diffusers', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)
assert not heavy, heavy
assert bittern.__version__
print(took)
"""
    assert min(float(run(code)) for _ in range(3)) < 0.3


@pytest.mark.parametrize("before", ["import diffusers", "import diffusers.quantizers.auto"])
def test_import_after_diffusers_adds_little_and_registers(before: str) -> None:
    code = f"""
import time
{before}
start = time.perf_counter()
import bittern
print(time.perf_counter() - start)
{REGISTERED}
"""
    assert float(run(code)) < 0.3


def test_import_before_diffusers_registers_when_it_is_imported() -> None:
    run(
        f"""
import importlib.util, sys, bittern
import diffusers
# Asking for the module, without importing it, changes nothing.
assert importlib.util.find_spec('diffusers.quantizers.auto') is not None
{REGISTERED}
import inspect, diffusers.quantizers.auto as auto
assert 'class DiffusersAutoQuantizer' in inspect.getsource(auto)
from diffusers.models.attention_dispatch import AttentionBackendName
assert AttentionBackendName('bittern_fp8') in AttentionBackendName
assert not any('bittern' in type(finder).__module__ for finder in sys.meta_path)
"""
    )


def test_public_names_resolve() -> None:
    run(
        """
import bittern
for name in bittern.__all__:
    assert getattr(bittern, name) is not None, name
assert set(bittern.__all__) == set(dir(bittern))
try:
    bittern.quantise
except AttributeError as error:
    assert 'quantise' in str(error)
else:
    raise AssertionError('an unknown name resolved')
"""
    )


def test_an_old_diffusers_is_refused_loudly() -> None:
    run(
        """
import diffusers
diffusers.__version__ = '0.39.1'
from bittern.errors import BitternError
try:
    import diffusers.quantizers.auto
    import bittern
    bittern.QuantizationConfig
except BitternError as error:
    assert "diffusers 0.39.1 is too old for bittern: pip install 'diffusers>=0.40'" in str(error), error
else:
    raise AssertionError('an old diffusers was accepted')
"""
    )
