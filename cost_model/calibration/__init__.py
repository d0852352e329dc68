"""Fitted operator tables, one file per device, with the versions they were fitted to."""
