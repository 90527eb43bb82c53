"""HTTP only: parse, call one function below, shape the answer. One file a noun."""
