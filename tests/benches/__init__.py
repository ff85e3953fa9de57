"""Thaw's benchmarks: `make bench` runs them all, `make bench ONLY=NAME` those whose names begin so.

    harness     rows, results, the table
    thaw        a run through the command line, and what it left in its folder
    workloads   models, exported once, and their data
    peers/      what runs in the processes beside us: PyTorch, Lightning
    rows/       the measurements; each gives one or more rows
"""
