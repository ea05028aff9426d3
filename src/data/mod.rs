//! Images, preprocessing and data sets.
