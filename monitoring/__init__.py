"""How a process of MISS is seen from outside: measures and their exposition, health and readiness, traces. It
knows nothing of what it shows: each process composes its own readings and checks."""
