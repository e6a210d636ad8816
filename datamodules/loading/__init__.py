"""Batches of samples: order, seeding, workers, padding."""
