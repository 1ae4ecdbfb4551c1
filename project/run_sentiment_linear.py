"""The classifier of `run_sentiment.py`, under the name that some courses import it by."""

from project.run_sentiment import Linear, Network, RParam, SentenceSentimentTrain

__all__ = ["Linear", "Network", "RParam", "SentenceSentimentTrain"]
