"""Jobs on a SLURM cluster: planned and submitted at the desk, requeued by themselves.

At the desk: ``jobs`` (what), ``desk`` (checks), ``snapshot`` (code), ``script`` (sbatch text),
``submit``. In the job: ``batch`` (one per attempt) starts ``node`` on every node; both run on the
standard library alone, so that ranks may live in a container. Afterwards: ``status``, ``logs``.
"""
