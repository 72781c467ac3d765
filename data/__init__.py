"""Everything that becomes a batch: records, benchmarks, frozen features, batches, instruction data."""
