"""From samples to batches: order, seeding, workers, padding."""
