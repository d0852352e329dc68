"""Plans of whole training jobs: degrees, schedule, microbatches, rematerialisation, offload."""
