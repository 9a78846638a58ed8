"""Triton's kernels without a GPU: compiled for one that is not there, or interpreted."""

import os
import subprocess
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Ampere (data centre, GeForce), Ada, Hopper, Blackwell (GeForce).
CAPABILITIES = [80, 86, 89, 90, 120]
TURING = 75  # has no bfloat16 of its own
# Triton has e4m3 from Ada on.
FP8_CAPABILITIES = [89, 90, 120]
# Bytes of shared memory that one program may have.
SHARED_MEMORY = {
    75: 64 * 1024,
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    120: 99 * 1024,
}


def compile_for(capability, kernel, signature, constants, **options):
    """The compiled kernel; pointers and integers are multiples of 16, as FLUX's sizes are."""
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if types[name].startswith("*") or types[name] == "i32"
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    # As every launch of ours: what is rounded does not depend on the compiler's taste.
    options = {"enable_fp_fusion": False} | options
    compiled = triton.compile(source, target=target, options=options)
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    return compiled


def run_interpreted(script, *arguments):
    """Run a script whose kernels Triton interprets: its exit code, and what it complains of."""
    imports_from_here = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1"} | imports_from_here,
        check=False,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr
