"""What a ward and the region both are: packs, fact log, index, ledger, intake, matching. Knows no network."""
