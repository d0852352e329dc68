"""Whole training jobs: columns of jobs, their step time, memory, and fitted constants."""
