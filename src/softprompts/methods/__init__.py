"""One file per paper; each registers its config. `registry.methods()` imports them all."""
