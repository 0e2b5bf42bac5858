"""What a finished run says of images: a table with the class and the probability of every class.

  uv run jobs/predict.py from_run=runs/<name> images=<file or folder> output=predictions.csv

Images are decoded and cropped as in the run's validation; one that cannot be read is a row with its error.
"""

from potstill.config import PredictConfig, job


@job("predict")
def main(config: PredictConfig) -> None:
    from potstill.inference import predict_files

    predict_files(config)


if __name__ == "__main__":
    main()
