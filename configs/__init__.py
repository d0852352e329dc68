"""Hydra configuration groups: model, cluster, device, optimizer, train, suite."""
