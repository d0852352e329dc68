"""Training a language model on real text under a plan.

text and its split -> batches on the devices -> the planned step -> metrics and checkpoints.
"""
