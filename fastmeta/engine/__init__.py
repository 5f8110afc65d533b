"""A meta-step as data flow: trace, plan, program, execute; unroll, then adjoint."""
