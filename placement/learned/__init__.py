"""The learned optimizer: a policy trained over many models and clusters, and its evaluation."""
