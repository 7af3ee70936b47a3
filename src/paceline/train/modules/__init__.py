"""What prepared modules do beside training: statistics over the ranks, hooks."""
