"""Fisher information of the inputs of a model: which inputs a prediction depends on, and how far apart inputs are.

The Fisher of an example x with logits z(x) and p = softmax(z) is F_x = J_xᵀ S J_x, with J_x = ∂z/∂x and
S = diag(p) - p pᵀ. The modules need only the values of the inputs and a function from values to logits.
"""
