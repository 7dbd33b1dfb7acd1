"""What the compiler makes of each kernel, for GPUs that need not be here: `python -m benchmarks.static`.

Triton compiles for a named target with no GPU present. That shows, per kernel, shape and target, the registers of a
thread, the bytes it spills, the shared memory of a block and the number of instructions, and it shows a type error that
the interpreter lets pass. On the way the intermediate code is searched for missing barriers (`barriers.py`), and PTX
for sums that come out differently in the threads that share them, and for memory that is accessed before it may be
(`ptx.py`).

The numbers of each Triton version are kept in `results/static.json`, and a number that grew is an error until that file
is written anew with --update. The same version of Triton gives the same numbers on every machine.
"""
