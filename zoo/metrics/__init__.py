"""Metrics that torchmetrics lacks, or computes otherwise than their source."""
