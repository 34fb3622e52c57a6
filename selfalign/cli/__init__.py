"""The commands, which `selfalign.cli.commands` lists."""
