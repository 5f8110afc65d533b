"""What every storey stands on: checks, environment, native loader, dispatch. No maths."""
