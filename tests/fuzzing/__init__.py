"""The crash fuzz: one worker of the pipeline, whose processes are killed wherever they are.

Workers, stages, rings, supervisor and ledger are the production ones, as real processes; only what
the stages load is not (`world`). Three hands kill, alone or together:

    signals   a SIGKILL from outside, at any instruction, of any stage, or of the whole worker
    steps     within csrc/ring.c, between two steps of the protocol
    lines     in Python, between two lines of evmp; by chance, or the n-th process at its n-th line

    run        runs a `scenario` in a process of its own; its verdict is over every byte
    killer     the hand from outside
    armed      those from inside
    custom     what users bring, where rows are samples
    judge      compares what came out with what `world` foretells
    mutants    protocols that are broken on purpose, each of which must be found
    soak       the long form, `make soak`
"""
