"""The commands: `selfalign`, `selfalign-evaluate`, `selfalign-report`, `selfalign-store`, `selfalign-workspace`."""
