"""Which tensors are encoded by Triton kernels, and that nobody else pays for them."""

from __future__ import annotations

import subprocess
import sys

import torch

from paceline.codecs.kernel import device as device_codecs


def test_a_cpu_process_imports_neither_triton_nor_cuda() -> None:
    code = (
        "import sys, torch; from paceline import codecs\n"
        "c = codecs.make('error_feedback(codec=int8)'); p = c.encode(torch.randn(100), {})\n"
        "codecs.decode(p, torch.empty(100)); codecs.make_reducer('topk')\n"
        "assert 'triton' not in sys.modules and not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_cpu_tensors_keep_the_cpp_kernels() -> None:
    assert not device_codecs.has_kernels(torch.device("cpu"))
    assert not device_codecs.can_encode("int8", torch.device("cpu"), {})


def test_what_has_no_kernel_is_known() -> None:
    assert not device_codecs.can_encode("threshold", torch.device("cuda"), {"entropy": True})
