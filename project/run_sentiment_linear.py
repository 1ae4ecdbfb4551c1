"""The classifier of `run_sentiment.py`, under the name that some courses import it by; as a program
it is the same one.

    python project/run_sentiment_linear.py --data reviews.tsv
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `project` is found

from project.run_sentiment import Linear, Network, RParam, SentenceSentimentTrain, main

__all__ = ["Linear", "Network", "RParam", "SentenceSentimentTrain", "main"]

if __name__ == "__main__":
    main()
