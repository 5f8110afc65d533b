"""Inner update rules: a step and its adjoint, and the rates they take."""
