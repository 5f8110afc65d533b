"""One step of RMSprop, Adagrad or Adam on every task's packed parameters, and its adjoint (docs/maths.md, section 8)."""
