"""Plots of weights, runs and tradeoffs; needs matplotlib."""

from keras_weightmods.plot.runs import mask_overlap as mask_overlap
from keras_weightmods.plot.runs import scaling as scaling
from keras_weightmods.plot.runs import sparsity_run as sparsity_run
from keras_weightmods.plot.tradeoffs import speed as speed
from keras_weightmods.plot.weights import bits as bits
from keras_weightmods.plot.weights import density as density
from keras_weightmods.plot.weights import distribution as distribution
from keras_weightmods.plot.weights import kernel as kernel
