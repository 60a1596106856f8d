// What one target says about an output, in double precision: learners/likelihoods.py. Included by
// head.cpp. Derivatives are of negative log likelihoods, up to a constant.

#include <float.h>
#include <math.h>

namespace {

// numbered as in `LIKELIHOODS` of learners/compiled.py; 0 is none of them
enum { LABELS = 1, COUNTS, POSITIVE, HEAVY_TAILS };

static double softplus(double x) { return fmax(x, 0) + log1p(exp(-fabs(x))); }
static double sigmoid(double x) { return x < 0 ? exp(x) / (1 + exp(x)) : 1 / (1 + exp(-x)); }

static double digamma(double x) {
    double value = 0;
    for (; x < 10; x++) value -= 1 / x;
    const double i = 1 / (x * x);
    return value + log(x) - 0.5 / x - i * (1. / 12 - i * (1. / 120 - i * (1. / 252 - i * (1. / 240 - i / 132))));
}

// derivatives by the output; of the first and the second by the dispersion
struct Local {
    double value, first, second, third, first_by, second_by;
};

// the output that is predicted, and derivatives of the loss of a query row
struct Told {
    double output, by_mean, by_variance, by_dispersion;
};

struct Likelihood {
    i64 kind;
    double dispersion, unit, delta; // the last is of heavy tails: 0 for logistic ones, else hyperbolic ones

    double scale() const { return sqrt(3 * dispersion) / M_PI; } // of the logistic distribution

    Local at(double output, double y) const {
        const double size = 1 / dispersion;
        if (kind == LABELS) {
            const double p = sigmoid(output), q = sigmoid(-output);
            return {softplus(output) - y * output, p - y, p * q, p * q * (q - p), 0, 0};
        }
        if (kind == COUNTS) {
            const double u = output + log(dispersion / unit), p = sigmoid(u), q = sigmoid(-u);
            const double count = y / unit, total = count + size, second = total * p * q, third = second * (q - p);
            return {total * softplus(u) - count * u, total * p - count,       second, third,
                    size * (second - size * p),      size * (third - size * p * q)};
        }
        if (kind == POSITIVE) {
            const double ratio = y * exp(-output), first = size * (1 - ratio), second = size * ratio;
            return {size * (ratio + output), first, second, -second, -size * first, -size * second};
        }
        if (delta > 0) { // the rate of a variance is right to a tenth, see `HyperbolicTails`
            const double r = output - y, root = sqrt(delta * delta + r * r), far = sqrt(delta * delta + 8 * dispersion);
            const double rate = (delta + far) * size / 2, curved = delta / root, by = size * (2 / (far * rate) - 1);
            const double first = rate * r / root, second = rate * curved * curved / root;
            return {rate * (root - delta), first, second, -3 * second * r / (root * root), by * first, by * second};
        }
        const double scale = this->scale(), r = (output - y) / scale, p = sigmoid(r), q = sigmoid(-r);
        const double first = (p - q) / scale, second = 2 * p * q / (scale * scale), third = second * (q - p) / scale;
        const double by = scale * size / 2; // scale by the dispersion
        return {fabs(r) + 2 * softplus(-fabs(r)),    first, second, third, -by * (first / scale + second * r),
                -by * (2 * second / scale + third * r)};
    }

    // information with which a step is never too long
    double bound(double output, double y) const {
        const double r = output - y;
        const Local row = at(output, y);
        return r * r < 1e-12 * dispersion ? row.second : row.first / r;
    }

    // output that a target alone suggests, and the variance of the suggestion
    void guess(double y, double &output, double &variance) const {
        output = y, variance = dispersion;
        if (kind == LABELS) output = 4 * y - 2, variance = 4;
        if (kind == COUNTS) output = log(y + unit / 2), variance += unit / (y + unit / 2);
        if (kind == POSITIVE) output = log(fmax(y, FLT_MIN));
    }

    Told told(double mean, double variance, double y) const {
        if (kind == LABELS) {
            const double factor = 1 / sqrt(1 + M_PI / 8 * variance), output = factor * mean, by = sigmoid(output) - y;
            return {output, factor * by, -M_PI / 16 * factor * factor * factor * mean * by, 0};
        }
        if (kind == HEAVY_TAILS) {
            const double total = dispersion + variance, std = sqrt(total), r = (mean - y) / std;
            const double by = 2.5 * r / (1 + r * r / 2), by_total = (1 - by * r) / (2 * total);
            return {mean + unit * std, by / std, by_total, by_total};
        }
        const double root = sqrt(1 + 2 * variance), doubt = root - 1, more = doubt + dispersion * root;
        const double output = mean + doubt / 2, size = 1 / more;
        double by_output, by_size;
        if (kind == COUNTS) {
            const double count = y / unit, u = output + log(more / unit);
            by_output = (count + size) * sigmoid(u) - count;
            by_size = softplus(u) + digamma(size) - digamma(count + size) - more * by_output;
        } else {
            const double ratio = y * exp(-output);
            by_output = size * (1 - ratio);
            by_size = ratio + output + digamma(size) - log(size) - 1 - log(fmax(y, FLT_MIN));
        }
        const double by_more = -size * size * by_size;
        return {output, by_output, (by_output / 2 + by_more * (1 + dispersion)) / root, by_more * root};
    }
};

} // namespace
