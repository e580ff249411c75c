"""gnnet: dense image features for feature-metric visual localization."""

__version__ = "0.2.0"
