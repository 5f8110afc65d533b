"""One step of RMSprop, Adagrad or Adam on all tasks' packed parameters, and its adjoint (docs/maths.md, eq. 19-22)."""
