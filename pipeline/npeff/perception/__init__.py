"""Perceptual scales: what Fisher information predicts of them, and how people's answers measure them.

`scales` integrates the Fisher information of a parameter along its values. `gaussian_texture` and `gaussian_path` have
the Fisher information of textures whose distribution is known. `difference_scaling` fits the answers of an experiment,
and `matching` compares a measured scale with a predicted one.

Source: J. Vacher & P. Mamassian, Perceptual scales predicted by Fisher information metrics, ICLR 2024
(arXiv:2310.11759). The tests check every closed form by quadrature or simulation.
"""
