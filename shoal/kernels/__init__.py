"""Native operators: C that the machine's compiler builds when first used, each with a torch path that answers the same."""
