"""The shipped jobs, and how a target on the command line becomes a job.

Importing this package imports no torch; a job's own file does, when the job is asked for.
"""

from shoal.jobs.registry import Target, find, list_jobs

__all__ = ["Target", "find", "list_jobs"]
