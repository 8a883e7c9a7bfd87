"""RecCocktail on Ray: LLM recommendation that is general and specific."""

__version__ = "0.1.0"
