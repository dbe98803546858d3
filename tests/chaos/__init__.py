"""The chaos test: a real job, by the real command, of which any process may be hit at any moment.

The job is started again until it is done. Then its result must be that of a job that nobody has
disturbed, byte for byte, and nothing else may be left.

    task       the job: photographs, bad rows, a small network, and what becomes of it undisturbed
    family     the processes of a job that live now
    hunter     whom to hit, when, and with what
    trial      one job from its first start to its last, and what must be so after each
    soak       the long form, `make soak`
"""
