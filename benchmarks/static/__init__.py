"""What the compiler makes of each kernel, for GPUs that need not be here: `python -m benchmarks.static`.

Triton compiles for a named target with no GPU present. That shows, per kernel, shape and target, the registers of a
thread, the bytes it spills, the shared memory of a block and the number of instructions, and it shows type errors that
the interpreter lets pass. On the way the intermediate code is searched for missing barriers (`barriers.py`), and PTX
for sums that differ between the threads that share them, and for memory accesses that are too early (`ptx.py`).

The numbers of each Triton version are kept in `results/static.json`, and a number that grew is an error until that file
is rewritten with --update. The same version of Triton gives the same numbers on every machine.
"""
