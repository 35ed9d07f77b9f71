//! rooms-grader
