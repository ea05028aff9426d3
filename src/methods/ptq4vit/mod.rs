//! PTQ4ViT: twin uniform quantization and a gradient-weighted scale search (Yuan et al., ECCV 2022,
//! arXiv 2111.12293).
//!
//! Symmetric static grids; post-GELU values and attention scores have two grids each. Every scale is
//! searched, both operands of a product in turns, for the least error of the product's float output,
//! each element weighted by a gradient. Specification: methods/ptq4vit.md. Where paper and released
//! code differ, an option names the choice.
//!
//! Calibration is parallel: every site sees float inputs. One unit's operands and gradients are held
//! at a time.

mod fit;
mod gradient;
mod grid;
mod search;
mod settings;
mod twin_gelu;
mod twin_softmax;

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use crate::calib::kept::{Tensors, restore_or_compute};
use crate::calib::report::{Seen, SiteLog, require_finite};
use crate::calib::{CalibrationTask, Quantization};
use crate::error::{Error, Result};
use crate::exec::{Float, Tap, TapSink};
use crate::methods::{Method, MethodEntry};
use crate::model::Model;
use crate::nn::{Operand, Site, SiteId};
use crate::quant::quantizer::boxed;
use crate::quant::{QuantPlan, Quantizer, QuantizerState};

use fit::{Schedule, SiteFit};
use gradient::{Gradient, Gradients, UnitGradients};
use search::Product;
use settings::Settings;
use twin_gelu::TwinGelu;
use twin_softmax::TwinSoftmax;

/// The registry line.
pub(super) const METHOD: MethodEntry = MethodEntry {
    id: "ptq4vit",
    summary: "static symmetric grids, twin grids for post-GELU and scores, gradient-weighted search",
    source: "PTQ4ViT, ECCV 2022, arXiv 2111.12293",
    options: settings::OPTIONS,
    build: || Box::new(Ptq4Vit),
    restore,
};

fn restore(state: &QuantizerState) -> Option<Result<Box<dyn Quantizer>>> {
    match state.kind.as_str() {
        twin_gelu::KIND => boxed(TwinGelu::restore(state)),
        twin_softmax::KIND => boxed(TwinSoftmax::restore(state)),
        _ => None,
    }
}

#[derive(Debug)]
struct Ptq4Vit;

impl Method for Ptq4Vit {
    fn calibrate(&self, task: &mut CalibrationTask<'_>) -> Result<Quantization> {
        let task = &*task;
        let settings = Settings::read(task)?;
        let model = task.model()?;
        let initial = match settings.gradient {
            Gradient::Perturbed => initial_plan(&settings, &model)?,
            Gradient::Fisher | Gradient::Mse | Gradient::Noise => QuantPlan::default(),
        };
        let mut gradients = Gradients::new(&settings, &model, initial)?;
        let log = SiteLog::new(task, "calibrate", model.units.len());
        let mut calibration = Calibration { settings, log, plan: QuantPlan::default() };
        let mut x = task.images.shallow_clone();
        for (index, unit) in model.units.iter().enumerate() {
            task.step("calibrate", index, model.units.len())?;
            let mut operands = Operands { settings: &calibration.settings, sites: BTreeMap::new() };
            x = unit.forward(&mut Tap::new(&mut Float, &mut operands), &x)?;
            let sites = operands.sites;
            let mut gradients = gradients.of_unit(index)?;
            for (site, pair) in sites {
                calibration.site(model.site(site)?, pair, &mut gradients)?;
            }
        }
        let Calibration { log, plan, .. } = calibration;
        Ok(Quantization { plan, report: log.finish(), ..Quantization::default() })
    }
}

/// The operands of the sites of one unit that are quantized, as the float network has them.
struct Operands<'s, 't, 'p> {
    settings: &'s Settings<'t, 'p>,
    sites: BTreeMap<SiteId, Pair>,
}

/// Left and right operand of a site.
#[derive(Debug, Default)]
struct Pair {
    lhs: Option<Tensor>,
    rhs: Option<Tensor>,
}

impl TapSink for Operands<'_, '_, '_> {
    fn operand(&mut self, site: &Site, operand: Operand, x: &Tensor) -> Result<()> {
        let both = [Operand::Lhs, Operand::Rhs];
        if both.iter().all(|operand| self.settings.grid(site, *operand).is_none()) {
            return Ok(());
        }
        require_finite(site, operand, x)?;
        let pair = self.sites.entry(site.id).or_default();
        match operand {
            Operand::Lhs => pair.lhs = Some(x.shallow_clone()),
            Operand::Rhs => pair.rhs = Some(x.shallow_clone()),
        }
        Ok(())
    }
}

/// The plan of the scales before any search.
fn initial_plan(settings: &Settings<'_, '_>, model: &Model) -> Result<QuantPlan> {
    struct Initial<'s, 't, 'p> {
        settings: &'s Settings<'t, 'p>,
        plan: QuantPlan,
    }

    impl TapSink for Initial<'_, '_, '_> {
        fn operand(&mut self, site: &Site, operand: Operand, x: &Tensor) -> Result<()> {
            require_finite(site, operand, x)?;
            if let Some(fit) = self.settings.fit(site, operand, x)? {
                self.plan.insert(site.id, operand, fit.quantizer(x)?);
            }
            Ok(())
        }
    }

    let mut initial = Initial { settings, plan: QuantPlan::default() };
    let images = &settings.task.images;
    let _logits = model.forward(&mut Tap::new(&mut Float, &mut initial), images)?;
    Ok(initial.plan)
}

/// Fits one site after another.
struct Calibration<'t, 'p> {
    settings: Settings<'t, 'p>,
    log: SiteLog<'t, 'p>,
    plan: QuantPlan,
}

impl Calibration<'_, '_> {
    fn site(&mut self, site: &Site, pair: Pair, gradients: &mut UnitGradients) -> Result<()> {
        let mut product = product(site, pair, self.log.task().image_count())?;
        product.importance = gradients.importance(site, &product.output.size())?;
        if product.importance.is_none() && self.settings.gradient != Gradient::Mse {
            let path = &site.path;
            self.log.warn(format!("{path}: the gradient vanishes, plain squared error is used"));
        }
        let mut fit = SiteFit {
            lhs: self.settings.fit(site, Operand::Lhs, &product.lhs)?,
            rhs: self.settings.fit(site, Operand::Rhs, &product.rhs)?,
        };
        let order = match site.role.is_matmul() {
            true => [Operand::Lhs, Operand::Rhs],
            false => [Operand::Rhs, Operand::Lhs],
        };
        let task = self.log.task();
        let stop = || task.progress.check_cancelled();
        let before = fit.scales()?;
        let fits = |kept: &Tensors| {
            kept.iter().map(layout).eq(before.iter().map(layout)) // the same operands and parts
        };
        let found = restore_or_compute(task, &format!("search.{}", site.path), fits, || {
            fit.search(&product, Schedule { order, rounds: self.settings.rounds }, &stop)?;
            fit.scales()
        })?;
        fit.set_scales(&found)?;
        for (operand, fit, x) in
            [(Operand::Lhs, fit.lhs, &product.lhs), (Operand::Rhs, fit.rhs, &product.rhs)]
        {
            let Some(fit) = fit else { continue };
            let quantizer = fit.quantizer(x)?;
            let x_hat = quantizer.fake_quantize(x)?;
            let quantizer_seen = quantizer.as_ref();
            self.log.record(&Seen {
                site,
                operand,
                quantizer: quantizer_seen,
                x,
                x_hat: &x_hat,
            })?;
            self.plan.insert(site.id, operand, quantizer);
        }
        Ok(())
    }
}

/// What two results of the same search have in common.
fn layout((name, tensor): &(String, Tensor)) -> (&str, Vec<i64>, Kind) {
    (name, tensor.size(), tensor.kind())
}

/// A site's product with the images first: [images, rows, k] · [n, k]ᵀ of a linear,
/// [images, windows, heads, m, k] · [images, windows, heads, n, k]ᵀ of attention.
fn product(site: &Site, pair: Pair, images: usize) -> Result<Product> {
    let Pair { lhs: Some(lhs), rhs: Some(rhs) } = pair else {
        return Err(Error::internal(format!("{} was shown without an operand", site.path)));
    };
    let images = images as i64;
    let (lhs, rhs) = if site.role.is_matmul() {
        let windows = |x: &Tensor| -> Result<Tensor> {
            let size = x.size();
            Ok(x.f_reshape([&[images, site.windows], &size[1..]].concat())?)
        };
        (windows(&lhs)?, windows(&rhs)?)
    } else {
        let channels = rhs.size()[1];
        (lhs.f_reshape([images, -1, channels])?, rhs)
    };
    let output = lhs.f_matmul(&rhs.f_transpose(-2, -1)?)?;
    Ok(Product { lhs, rhs, output, importance: None })
}

#[cfg(test)]
mod tests;
