"""One file a backbone; each class implements `fastgrpo.interfaces.Policy` and is named by its
dotted path in a recipe.
"""
