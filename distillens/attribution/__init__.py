"""What single images do to a trained network: gradients, and estimators of influence without retraining."""
