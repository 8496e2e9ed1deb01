"""Space that is given back: whose bytes an archive gives up, how its packs go, and the thread that sees to
it."""
