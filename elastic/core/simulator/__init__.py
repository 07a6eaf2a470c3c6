"""The step protocol in virtual time under seeded faults, checked after every event."""
