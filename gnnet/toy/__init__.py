"""The toy town: a rendered city with exact ground truth, in the layout of RobotCar Seasons."""
